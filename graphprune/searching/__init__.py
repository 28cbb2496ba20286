"""What agents are asked, how their answers are judged, and where that is kept."""
