"""Programs built with Stentor."""
