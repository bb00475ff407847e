"""Door sign."""
