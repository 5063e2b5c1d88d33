"""What was read or measured of files once, and is stored until they change."""
