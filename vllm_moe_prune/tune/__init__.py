"""Finding the best plan for a size: candidates, how they are judged, and the front."""
