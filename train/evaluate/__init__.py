"""What a trained model can do: recall at a distance, answers held to a schema, drafts that are accepted."""
