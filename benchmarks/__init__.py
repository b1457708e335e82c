"""What produced the figures that the README quotes; ``make bench`` runs ``acceptance``."""
