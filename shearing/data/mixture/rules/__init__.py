"""Update rules of the domain weights."""
