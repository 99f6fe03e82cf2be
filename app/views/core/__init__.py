"""Pages that every run has: the runs themselves, and questions in SQL. They know no experiment."""
