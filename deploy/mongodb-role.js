// Creates the role and the user of the Loyalty Microservice, with only the privileges that it needs:
//
//   mongosh "mongodb://admin@db1.example.com/?replicaSet=rs0" deploy/mongodb-role.js
//
// First edit the names below to match MONGODB_DATABASE and the *_COLLECTION settings. Field names do
// not matter here. The script asks for the password of a new user. Run it again after a change: it
// replaces the privileges of the role, and an existing user keeps its password. The service then
// connects with mongodb://loyalty:PASSWORD@db1.example.com/?replicaSet=rs0 (the role and the user are
// in the database `admin`). Atlas does not allow this script: create a custom role with the same
// privileges there. docs/connections.md says which command needs which privilege.

// Names to edit:
const database = "oms_db";
const orders = "orders";
const users = "users";
const recounts = "loyalty_recounts";
const changes = "loyalty_changes";
const user = "loyalty";
const role = "loyaltyMicroservice";

const privileges = [
  { resource: { db: database, collection: orders }, actions: ["find"] },
  // For --create-index only; the service itself does not need it. With USER_KEY_FIELD also on users.
  // { resource: { db: database, collection: orders }, actions: ["createIndex"] },
  // For LIVE_UPDATES=yes: the change stream, and the heartbeat in the collection of records.
  // { resource: { db: database, collection: orders }, actions: ["changeStream"] },
  // { resource: { db: database, collection: recounts }, actions: ["update"] },
  { resource: { db: database, collection: users }, actions: ["find", "update"] },
  // createIndex is for the TTL indexes: the server deletes records and changes after RETENTION.
  { resource: { db: database, collection: recounts }, actions: ["find", "insert", "createIndex"] },
  // find is for --changes, --customer, --status and --undo.
  { resource: { db: database, collection: changes }, actions: ["find", "insert", "createIndex"] },
  // Optional: lets the service see whether pre-images are on. See docs/live-updates.md.
  { resource: { db: database, collection: "" }, actions: ["listCollections"] },
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
