"""What produced the figures that the README quotes.

``make bench`` runs ``compare``, ``make acceptance`` runs ``acceptance``.
"""
