"""What the tokens of a conversation mean: the chat format, and grammars that hold an answer to a shape."""
