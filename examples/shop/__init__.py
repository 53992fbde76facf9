"""The shop example: three services in processes of their own, see README.md."""
