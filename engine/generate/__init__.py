"""Generation: scheduler (who runs), cache (K/V pages), sampling (the law), generator (the loop)."""
