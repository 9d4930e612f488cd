"""The token that opens every document of a byte-level model; 0 to 255 are its bytes (`tokenizers.ByteTokenizer`)."""

BOS = 256
