"""How many processes an app needs: told to KEDA, or followed by the supervisor on one host."""
