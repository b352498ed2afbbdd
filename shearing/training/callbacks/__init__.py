"""What goes on around the steps of a stage, one file each; `standard` says which of them every stage has."""

from __future__ import annotations
