"""The gateway: a router in front of real engines, with the HTTP interface of OpenAI. Needs the extra gateway."""
