"""Pictures of what a frozen backbone sees, and where they come from; the command is `dinov2.eval.visualize`."""
