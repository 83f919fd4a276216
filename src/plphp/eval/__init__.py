"""How much a method loses: tasks, metrics, a resumable run, and what it shows."""
