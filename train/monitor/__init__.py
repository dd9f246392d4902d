"""What a run tells while it goes on: metrics, curves, events, a report, progress, and when it diverged."""
