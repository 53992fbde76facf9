"""What running programs tell of themselves, read from outside."""
