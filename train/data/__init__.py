"""From documents to batches: corpora, rows, tokenizers, planted tasks, and what a run asks of its data."""
