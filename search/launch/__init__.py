"""What every room stands on: the processes of a launch, what they spend, what is remembered and what is said."""
