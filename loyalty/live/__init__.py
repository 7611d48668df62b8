"""Live updates: recount only the customers whose orders have changed."""
