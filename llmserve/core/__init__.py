"""The scheduler's world: requests, blocks and steps as plain data. Standard library only."""
