"""What a step minimises: objectives, one file each, one interface, one list of names (`registry`)."""
