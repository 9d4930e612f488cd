"""From a prompt to tokens: sampling, reading a prompt in chunks, drafting with MTP."""
