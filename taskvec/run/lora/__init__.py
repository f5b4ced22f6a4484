"""A full fine-tune as a PEFT adapter: its differences as products of low rank."""
