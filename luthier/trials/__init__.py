"""Many runs: which there are (design), where each stands (desk), doing them (work), watching (watch), what they say (gather)."""
