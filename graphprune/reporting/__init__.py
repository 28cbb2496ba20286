"""What people read: the report, its pictures, and tables."""
