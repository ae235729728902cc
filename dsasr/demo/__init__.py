"""What the demo is made of: sentences from a grammar, spoken by synthetic voices."""
