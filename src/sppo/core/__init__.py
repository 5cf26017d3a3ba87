"""What everything else stands on: configuration, artifacts and their records, tables, errors."""
