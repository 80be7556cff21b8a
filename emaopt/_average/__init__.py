"""Average the parameters."""
