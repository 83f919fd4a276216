"""Evaluation of pruning methods: tasks, metrics, a resumable run, and its summary."""
