"""The commands of ``ildistil``; one file each."""
