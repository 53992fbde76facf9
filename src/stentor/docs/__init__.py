"""A picture and a document of apps: what ``stentor docs`` writes, and the changes of events that it tells."""
