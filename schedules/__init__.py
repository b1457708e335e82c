"""Ground floor: instruction sets, TIR computes and schedules. Knows nothing of ViTs."""
