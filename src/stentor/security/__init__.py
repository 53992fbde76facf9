"""Who sent it, who may, and where one may go."""
