"""What speculation takes and gives in a plan: its choices, the allocator that weighs them, and weighing again."""
