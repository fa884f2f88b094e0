"""Pages and pictures of finished runs, from what lies in their folders."""
