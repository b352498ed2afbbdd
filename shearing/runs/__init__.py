"""What a run is: its recipe, its folder, how it is launched; its stages, plan and report."""
