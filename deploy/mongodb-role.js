// Makes the role and the user of the Loyalty Microservice, with just the privileges that it needs:
//
//   mongosh "mongodb://admin@db1.example.com/?replicaSet=rs0" deploy/mongodb-role.js
//
// Edit the names below where your shop's are others, as in MONGODB_DATABASE and *_COLLECTION; names
// of fields do not matter here. It asks for the new user's password. Run it again after a change:
// the role is replaced, and a user that is there keeps its password. The service then connects with
// mongodb://loyalty:PASSWORD@db1.example.com/?replicaSet=rs0 (both live in the database `admin`).
// In Atlas, which does not let this run, make a custom role with the same privileges.

// What to edit:
const database = "oms_db";
const orders = "orders";
const users = "users";
const recounts = "loyalty_recounts";
const user = "loyalty";
const role = "loyaltyMicroservice";

const privileges = [
  { resource: { db: database, collection: orders }, actions: ["find"] },
  // For --create-index; the service itself does without.
  // { resource: { db: database, collection: orders }, actions: ["createIndex"] },
  // For LIVE_UPDATES=yes: the change stream, and the heartbeat among the records.
  // { resource: { db: database, collection: orders }, actions: ["changeStream"] },
  // { resource: { db: database, collection: recounts }, actions: ["update"] },
  { resource: { db: database, collection: users }, actions: ["find", "update"] },
  // createIndex is for the index that lets a record expire after 90 days.
  { resource: { db: database, collection: recounts }, actions: ["find", "insert", "createIndex"] },
];

const admin = db.getSiblingDB("admin");

if (admin.getRole(role)) {
  admin.updateRole(role, { privileges, roles: [] });
} else {
  admin.createRole({ role, privileges, roles: [] });
}
if (admin.getUser(user)) {
  admin.updateUser(user, { roles: [role] });
} else {
  admin.createUser({ user, pwd: passwordPrompt(), roles: [role] });
}
print(`The user ${user} has the role ${role}: see .env.example for MONGODB_URI`);
