"""Pictures of results that lie in files."""
