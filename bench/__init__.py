"""The app that runs the strategies, and its instruments."""
