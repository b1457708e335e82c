"""Records of tuning that ship with the package: ``INSTRUCTION_SET.jsonl``, read by default."""
