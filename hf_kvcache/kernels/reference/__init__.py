"""Every operation in plain torch: the definition that the fast implementations are tested against."""
