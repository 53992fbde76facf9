"""Every flight that left New York in 2013, replayed as events. README.md tells what it shows and how to run it."""
