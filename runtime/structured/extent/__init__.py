"""How large a schema, a pattern or a grammar becomes when it is expanded, found without expanding it."""
