-- Run by PostgreSQL's image, once, when its volume is new: Holdfast owns its database and is no superuser.
\getenv password DATABASE_PASSWORD
CREATE ROLE holdfast LOGIN PASSWORD :'password';
CREATE DATABASE holdfast OWNER holdfast;
