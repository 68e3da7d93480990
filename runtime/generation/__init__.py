"""Generation: from a prompt to tokens and text, alone or in batches."""
