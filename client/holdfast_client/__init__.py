"""What an engine or a billing system needs of Holdfast, a credit ledger. Knows neither the worker nor the ledger."""
