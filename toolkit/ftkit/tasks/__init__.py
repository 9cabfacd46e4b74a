"""What models learn and how they are judged, and their losses."""
