"""The acceptance length that a drafter really has, and experiments that compare recipes by it."""
