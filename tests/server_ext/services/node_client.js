// Samples a tree with @grpc/grpc-js and its defaults, and prints as JSON how many messages of each
// kind came, or the error.
//
//     node node_client.js PACKAGES PROTOS TARGET
const [packages, protos, target] = process.argv.slice(2);
const load = require('module').createRequire(`${packages}/`);
const grpc = load('@grpc/grpc-js');
const loader = load('@grpc/proto-loader');

const definition = loader.loadSync('ibtree/v1/sampling.proto', { includeDirs: [protos] });
const { TreeSamplingService } = grpc.loadPackageDefinition(definition).ibtree.v1;
const client = new TreeSamplingService(target, grpc.credentials.createInsecure());

const seen = { expansion: 0, progress: 0, tree: 0, error: '' };
const call = client.SampleTree({ prompt: { text: 'What?', answer: '1' } });
call.on('data', (message) => {
  for (const kind of Object.keys(message)) seen[kind] += 1;
});
call.on('error', (error) => {
  seen.error = error.message;
});
call.on('close', () => {
  console.log(JSON.stringify(seen));
  client.close();
});
