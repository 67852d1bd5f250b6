"""The ledger: its rules, its store in PostgreSQL, and its queries. Knows neither Celery nor HTTP."""
